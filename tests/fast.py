"""XLA's flags for tests: what compiles fast, for programs that hardly run.

Compiling is most of a test's time. Unoptimized machine code, and fusions written by XLA's older
emitters, take a third of it.
"""

FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false"
)
