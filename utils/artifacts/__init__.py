"""What is on disk: whole or not there, sealed, found again, locked."""
