"""Foundations that know neither head graphs nor attention: configurations, checkpoints, tables, command lines."""
