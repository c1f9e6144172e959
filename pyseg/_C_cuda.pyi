architectures: str
