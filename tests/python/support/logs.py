"""Log messages."""


def own_messages(caplog):
    """The messages of headwise's loggers: others may log too, after a test that turned them on."""
    return [own.getMessage() for own in caplog.records if own.name.startswith("headwise")]
