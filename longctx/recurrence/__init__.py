"""Recurrent token mixers and the scans they are made of."""
