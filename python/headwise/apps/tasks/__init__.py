"""The texts and models that the programs share."""
