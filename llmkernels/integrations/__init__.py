"""Adapters that other engines load; each file imports its engine only when that engine calls it."""
