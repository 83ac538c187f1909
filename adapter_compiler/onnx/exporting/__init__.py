"""The export that users call: translate, verify, cast, describe and write a file."""
