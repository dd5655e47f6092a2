// A static library in place of one of CUDA's shared libraries. Programs linked with it start on any machine; the real
// library is opened at the first call of one of its functions. Where there is none, every function answers MISSING, an
// error code of that library, so that opening a device is an ordinary error.
//
// Compiled once a library: SONAME is the file to open, ENTRIES a file with one ENTRY(function, index) a line.
// Folders in the environment variable CUDA_SHIM_PATH, separated by colons, are searched before all others.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ENTRY(name, index) #name,
static const char *const names[] = {
#include ENTRIES
};
#undef ENTRY

enum { COUNT = sizeof names / sizeof *names };
__attribute__((used)) static void *slots[COUNT]; // addresses of the real functions, null until the first call
static void *library;

static void *open_in(const char *folder, int length) {
    char path[4096];
    int written = snprintf(path, sizeof path, "%.*s/%s", length, folder, SONAME);
    return written < (int)sizeof path ? dlopen(path, RTLD_NOW | RTLD_GLOBAL) : NULL;
}

static void open_library(void) {
    static const char *const usual[] = {"/usr/local/cuda/lib64", "/usr/local/nvidia/lib64", "/usr/local/nvidia/lib"};
    const char *folders = getenv("CUDA_SHIM_PATH");
    while (folders && *folders && !library) {
        int length = strcspn(folders, ":");
        if (length) library = open_in(folders, length);
        folders += length + (folders[length] == ':');
    }
    if (!library) library = dlopen(SONAME, RTLD_NOW | RTLD_GLOBAL);
    for (unsigned i = 0; i < sizeof usual / sizeof *usual && !library; i++)
        library = open_in(usual[i], strlen(usual[i]));
}

static int missing(void) { return MISSING; }
static const char *missing_text(void) { return SONAME " is not there"; }

__attribute__((used)) static void *resolve(unsigned index) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, open_library);
    void *function = library ? dlsym(library, names[index]) : NULL;
    // The driver's own functions all return codes; in the other libraries those named for a text return that text.
    int text =
        strncmp(names[index], "cuGet", 5) && (strstr(names[index], "String") || strstr(names[index], "StatusName"));
    if (!function) function = text ? (void *)missing_text : (void *)missing;
    __atomic_store_n(&slots[index], function, __ATOMIC_RELEASE);
    return function;
}

// Every register that can carry an argument survives the search; then the real function is entered as if called
// directly.
__attribute__((naked, used)) static void first_call(void) {
    asm("pushq %rbp\n movq %rsp, %rbp\n"
        "pushq %rax\n pushq %rdi\n pushq %rsi\n pushq %rdx\n pushq %rcx\n pushq %r8\n pushq %r9\n"
        "subq $136, %rsp\n"
        "movups %xmm0, (%rsp)\n movups %xmm1, 16(%rsp)\n movups %xmm2, 32(%rsp)\n movups %xmm3, 48(%rsp)\n"
        "movups %xmm4, 64(%rsp)\n movups %xmm5, 80(%rsp)\n movups %xmm6, 96(%rsp)\n movups %xmm7, 112(%rsp)\n"
        "movl %r11d, %edi\n call resolve\n movq %rax, %r11\n"
        "movups (%rsp), %xmm0\n movups 16(%rsp), %xmm1\n movups 32(%rsp), %xmm2\n movups 48(%rsp), %xmm3\n"
        "movups 64(%rsp), %xmm4\n movups 80(%rsp), %xmm5\n movups 96(%rsp), %xmm6\n movups 112(%rsp), %xmm7\n"
        "addq $136, %rsp\n"
        "popq %r9\n popq %r8\n popq %rcx\n popq %rdx\n popq %rsi\n popq %rdi\n popq %rax\n"
        "popq %rbp\n jmp *%r11\n");
}

#define ENTRY(name, index)                                                                                             \
    asm(".text\n.globl " #name "\n.type " #name ", @function\n" #name ":\n"                                            \
        "movq slots+8*" #index "(%rip), %r11\n testq %r11, %r11\n jz 1f\n jmp *%r11\n"                                 \
        "1: movl $" #index ", %r11d\n jmp first_call\n");
#include ENTRIES
