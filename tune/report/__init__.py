"""The report of a study: `report.py` writes one HTML file of what is in `page/`."""
