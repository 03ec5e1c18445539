"""Print tables and live views on the terminal."""
