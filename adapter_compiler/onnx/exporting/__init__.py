"""The export as a user calls it: translate, verify, cast, write."""
