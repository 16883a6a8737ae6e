def doctor() -> None:
    "placeholder"
