"""Uses of a finished run: as a judge, in a chat, as an export for others."""
