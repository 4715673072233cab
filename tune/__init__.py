"""The interval for a user's own model: searched, confirmed on fresh prompts and seeds, and told in one report."""

LANGUAGES = "en", "ja"  # Of the report.
