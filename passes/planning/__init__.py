"""Which weight gets what: sites, rules, plans."""
