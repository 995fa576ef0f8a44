"""The Triton kernels of fused_resnet, one module an op; a part of it, not a package of its own."""

if __name__ != "fused_resnet.triton_kernels":
    raise ImportError(
        f"these are the kernels of fused_resnet, not a package called {__name__}: "
        "import fused_resnet.triton_kernels (or start Python in another folder)"
    )
