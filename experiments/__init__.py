"""What made the published numbers: one folder for each topic, started by `python -m experiments TOPIC`."""
