"""Helpers of the tests that run as programs of their own."""
