"""Write the HTML report, a single file."""
