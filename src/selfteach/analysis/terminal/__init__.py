"""Tables and live views on the terminal."""
