"""Publishes a run: pictures, the model card and its checks, and the push to the Hub."""
