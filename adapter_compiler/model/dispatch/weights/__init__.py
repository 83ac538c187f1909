"""The tensor that a read of an adapted weight gives: its values, products, attention, writes and operators."""
