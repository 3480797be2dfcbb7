// Runs a model of a bundle: run MODEL INPUT [LIBRARY]
//
// INPUT holds one prepared input as float32 numbers and nothing else. LIBRARY is the native operator, which computes the
// scans in the place of their standard operators. Prints every number of the first output, one on each line.

#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <fstream>
#include <functional>
#include <iterator>
#include <numeric>
#include <string>
#include <vector>

static int run(int count, char** words) {
    Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "run");
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(1);
    options.AddConfigEntry("quartermap.threads", "1");  // before the library, which reads it
    if (count > 3) options.RegisterCustomOpsLibrary(words[3]);
    Ort::Session session(env, words[1], options);

    std::ifstream file(words[2], std::ios::binary);
    std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    std::vector<float> input(bytes.size() / sizeof(float));
    std::memcpy(input.data(), bytes.data(), input.size() * sizeof(float));
    auto shape = session.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();
    if (shape[0] < 0) shape[0] = 1;  // any batch
    const auto wanted = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
    if (int64_t(input.size()) != wanted) {
        std::fprintf(stderr, "%s has %zu numbers, which the model does not take\n", words[2], input.size());
        return 1;
    }

    Ort::AllocatorWithDefaultOptions allocator;
    const auto in = session.GetInputNameAllocated(0, allocator);
    const auto out = session.GetOutputNameAllocated(0, allocator);
    const char *ins[] = {in.get()}, *outs[] = {out.get()};
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    auto tensor =
        Ort::Value::CreateTensor<float>(memory, input.data(), input.size(), shape.data(), shape.size());
    const auto found = session.Run(Ort::RunOptions{}, ins, &tensor, 1, outs, 1);
    const float* values = found[0].GetTensorData<float>();
    const size_t size = found[0].GetTensorTypeAndShapeInfo().GetElementCount();
    for (size_t i = 0; i < size; ++i) std::printf("%.9g\n", values[i]);
    return 0;
}

int main(int count, char** words) {
    if (count < 3) return std::fprintf(stderr, "usage: %s MODEL INPUT [LIBRARY]\n", words[0]), 2;
    try {
        return run(count, words);
    } catch (const std::exception& error) {
        return std::fprintf(stderr, "%s\n", error.what()), 1;
    }
}
