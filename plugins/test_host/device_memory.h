// Memory that the kernel can reach: the device's, or with emulated kernels the host's.
#pragma once

#include <cstddef>

namespace quartermap::host
{

// Filled with bytes of 0xff: NaN in every type.
class Memory
{
public:
    explicit Memory(std::size_t bytes);
    Memory(Memory&& other) noexcept;
    Memory(Memory const&) = delete;
    ~Memory();

    void* get() const;
    bool write(void const* from, std::size_t bytes);
    bool read(void* to, std::size_t bytes) const;

private:
    std::size_t bytes_;
    void* data_ = nullptr;
    bool fine_ = true;
};

bool device_present();
bool synchronise();

} // namespace quartermap::host
