"""Loading, export, model cards, pushes to the Hub."""
