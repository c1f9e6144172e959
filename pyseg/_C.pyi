version: str
torch_version: str
cxx_compiler: str
cuda_version: str

def cpu_capability() -> str: ...
