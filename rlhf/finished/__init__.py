"""What one does with a finished run: judge it, talk to it, export it."""
