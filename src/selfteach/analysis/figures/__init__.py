"""Draw the figures of the report with matplotlib."""
