"""Atomic files, Markdown escaping and shared type aliases."""
