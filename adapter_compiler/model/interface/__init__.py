"""What an adapted model shows of itself: reports, names that PEFT users know, signatures, parameter groups."""
