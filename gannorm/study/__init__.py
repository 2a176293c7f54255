"""The norm study: every norm in both tasks."""
