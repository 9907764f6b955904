"""Uses of a finished run: as a judge, in a chat, in a comparison, as an export for others."""
