// Operands inside one parameter struct.
struct Params {
    const int *a, *b;
    int *out;
    int count;
};

extern "C" __global__ void add_struct(const __grid_constant__ Params p) {
    const int i = threadIdx.x;
    if (i < p.count) p.out[i] = p.a[i] + p.b[i];
}
