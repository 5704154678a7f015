"""Loading, export, model cards and pushing to the Hub."""
