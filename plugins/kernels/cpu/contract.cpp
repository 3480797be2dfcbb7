// What a library says of itself. The build gives it the release of quartermap-deploy and the hash of the sources.
#include "instruction_sets.h"
#include "quartermap/cpu_scan.h"

#if !defined(QUARTERMAP_RELEASE)
#define QUARTERMAP_RELEASE "unknown"
#endif
#if !defined(QUARTERMAP_SOURCES)
#define QUARTERMAP_SOURCES "unknown"
#endif

#if defined(__clang__)
#define QUARTERMAP_COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define QUARTERMAP_COMPILER "gcc " __VERSION__
#else
#define QUARTERMAP_COMPILER "another"
#endif

#if defined(__x86_64__) || defined(_M_X64)
#define QUARTERMAP_PROCESSOR "x86_64"
#elif defined(__aarch64__) || defined(_M_ARM64)
#define QUARTERMAP_PROCESSOR "aarch64"
#else
#define QUARTERMAP_PROCESSOR "another"
#endif

#define QUARTERMAP_TEXT_OF(value) #value
#define QUARTERMAP_TEXT(value) QUARTERMAP_TEXT_OF(value)

char const* quartermap_cpu_contract(void)
{
    return "{\"library\": \"quartermap_cpu\", \"version\": " QUARTERMAP_TEXT(QUARTERMAP_CPU_SCAN_VERSION)
        ", \"release\": \"" QUARTERMAP_RELEASE "\", \"sources\": \"" QUARTERMAP_SOURCES
        "\", \"compiler\": \"" QUARTERMAP_COMPILER "\", \"processor\": \"" QUARTERMAP_PROCESSOR
        "\", \"instruction_sets\": " QUARTERMAP_BUILT_SETS
        ", \"element_types\": [\"float32\", \"float16\", \"bfloat16\", \"float64\"]"
        ", \"operators\": [\"SelectiveScan2D\", \"SelectiveScan\", \"LayerNormalization2D\"]}";
}
