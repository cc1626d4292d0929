"""Libraries that LoRAPre is used from."""
