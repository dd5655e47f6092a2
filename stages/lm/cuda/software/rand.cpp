// libcurand.so.10 without a GPU: a device cannot be opened without a generator, and nothing here draws from it.
extern "C" {
int curandCreateGenerator(void **out, int) { return *out = new char, 0; }
int curandGetVersion(int *version) { return *version = 10400, 0; }
int curandDestroyGenerator(void *generator) { return delete static_cast<char *>(generator), 0; }
int curandSetPseudoRandomGeneratorSeed(void *, unsigned long long) { return 0; }
int curandSetGeneratorOffset(void *, unsigned long long) { return 0; }
int curandSetStream(void *, void *) { return 0; }
}
