"""What happens between two optimizer steps: budgets, starts from data, resume."""
