"""Data: files and Hub datasets to rows of text, images and features; tokenization and packing."""
