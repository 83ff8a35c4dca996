"""report.html and the table for a terminal: everything here is drawn from results.json."""
