"""What several test modules share: the oracle, models, documents and programs."""
