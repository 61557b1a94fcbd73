"""What is read from an artifact folder is checked here before anything is believed of it."""
