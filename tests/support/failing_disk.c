/* A disk that fails on purpose, preloaded into one rank: the Nth write or sync of files whose path
   contains MDATTN_FAIL_PATH fails, with ENOSPC or EIO, and so do all after it if MDATTN_FAIL_ON is
   "from". What was counted is written to MDATTN_FAIL_COUNT when the process ends.

   cc -shared -fPIC -o failing_disk.so failing_disk.c -ldl
*/
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long calls;

static const char *setting(const char *name) {
    const char *value = getenv(name);
    return value ? value : "";
}

/* Only the rank that was chosen has a bad disk. */
static int here(void) {
    const char *wanted = setting("MDATTN_FAIL_RANK");
    return !strcmp(wanted, setting("OMPI_COMM_WORLD_RANK")) || !strcmp(wanted, setting("PMI_RANK"));
}

static int concerns(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return setting("MDATTN_FAIL_PATH")[0] && strstr(path, setting("MDATTN_FAIL_PATH")) != NULL
           && strstr(path, ".h5.run/") == NULL;
}

static void count(long number) {
    const char *path = setting("MDATTN_FAIL_COUNT");
    if (!path[0]) return;
    FILE *file = fopen(path, "w");
    if (file) {
        fprintf(file, "%ld\n", number);
        fclose(file);
    }
}

/* Count one call; true if it is to fail. */
static int fails(int fd) {
    if (!here() || !concerns(fd)) return 0;
    long number = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST), first = atol(setting("MDATTN_FAIL_AT"));
    count(number);
    if (number != first && !(number > first && !strcmp(setting("MDATTN_FAIL_ON"), "from"))) return 0;
    if (first <= 0) return 0;
    errno = !strcmp(setting("MDATTN_FAIL_WITH"), "EIO") ? EIO : ENOSPC;
    return 1;
}

#define REAL(result, name, types) static result (*real) types; if (!real) real = (result (*) types) dlsym(RTLD_NEXT, #name)

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    REAL(ssize_t, pwrite, (int, const void *, size_t, off_t));
    return fails(fd) ? -1 : real(fd, data, size, at);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    REAL(ssize_t, pwrite64, (int, const void *, size_t, off64_t));
    return fails(fd) ? -1 : real(fd, data, size, at);
}

ssize_t pwritev(int fd, const struct iovec *parts, int number, off_t at) {
    REAL(ssize_t, pwritev, (int, const struct iovec *, int, off_t));
    return fails(fd) ? -1 : real(fd, parts, number, at);
}

ssize_t pwritev64(int fd, const struct iovec *parts, int number, off64_t at) {
    REAL(ssize_t, pwritev64, (int, const struct iovec *, int, off64_t));
    return fails(fd) ? -1 : real(fd, parts, number, at);
}

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, write, (int, const void *, size_t));
    return fails(fd) ? -1 : real(fd, data, size);
}

int fsync(int fd) {
    REAL(int, fsync, (int));
    return fails(fd) ? -1 : real(fd);
}

int fdatasync(int fd) {
    REAL(int, fdatasync, (int));
    return fails(fd) ? -1 : real(fd);
}

int ftruncate(int fd, off_t size) {
    REAL(int, ftruncate, (int, off_t));
    return fails(fd) ? -1 : real(fd, size);
}

int ftruncate64(int fd, off64_t size) {
    REAL(int, ftruncate64, (int, off64_t));
    return fails(fd) ? -1 : real(fd, size);
}

int fallocate(int fd, int mode, off_t at, off_t size) {
    REAL(int, fallocate, (int, int, off_t, off_t));
    return fails(fd) ? -1 : real(fd, mode, at, size);
}

int fallocate64(int fd, int mode, off64_t at, off64_t size) {
    REAL(int, fallocate64, (int, int, off64_t, off64_t));
    return fails(fd) ? -1 : real(fd, mode, at, size);
}

int posix_fallocate(int fd, off_t at, off_t size) {
    REAL(int, posix_fallocate, (int, off_t, off_t));
    return fails(fd) ? errno : real(fd, at, size);
}

int posix_fallocate64(int fd, off64_t at, off64_t size) {
    REAL(int, posix_fallocate64, (int, off64_t, off64_t));
    return fails(fd) ? errno : real(fd, at, size);
}
