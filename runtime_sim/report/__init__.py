"""Predictions for people: text, HTML and charts."""
