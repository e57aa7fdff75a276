"""The round trip as a Flower app."""
