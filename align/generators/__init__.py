"""What answers conversations with text."""
