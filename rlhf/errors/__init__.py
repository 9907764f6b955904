"""What goes wrong, and the one sentence that says so."""
