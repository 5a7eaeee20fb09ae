"""Hostile files: cases made from seeds, and the judge that says whether a loader has behaved."""
