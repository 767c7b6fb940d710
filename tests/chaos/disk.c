/* Logs the calls of one process that change files in one folder, and makes them fail on request. It is loaded before the
   C library (LD_PRELOAD) and replaces these calls. Each call is counted and logged with its data. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { FILES = 1024 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char *folder;
static char *opened[FILES]; /* paths by descriptor */
static long calls, fail_at = -1;
static int fail_with, fail_on;
static int record = -1;

/* ---- functions that the gate calls */

void disk_watch(const char *path, int log) {
    free(folder);
    folder = strdup(path);
    record = log;
    calls = 0;
    fail_at = -1;
}

/* Call number `at` (from 0) fails; with `on`, all later calls that need disk space fail too. */
void disk_fail(long at, int with, int on) {
    calls = 0;
    fail_at = at;
    fail_with = with;
    fail_on = on;
}

long disk_calls(void) { return calls; }

/* ---- */

static int watched(const char *path) { return folder && path && !strncmp(path, folder, strlen(folder)); }

static const char *path_of(int file) { return file >= 0 && file < FILES ? opened[file] : NULL; }

static int fails(char what) {
    long now = calls++;
    int due = fail_at >= 0 && (now == fail_at || (fail_on && now > fail_at && strchr("ows", what)));
    if (due) errno = fail_with;
    return due;
}

static void put(const void *data, size_t size) {
    if (syscall(SYS_write, record, data, size) != (long)size) abort();
}

/* a record: kind, lengths of path and data, offset; then path and data */
static void note(char what, const char *path, int64_t offset, const void *data, int64_t size) {
    if (record < 0) return;
    int64_t head[4] = {what, (int64_t)strlen(path), size, offset};
    put(head, sizeof head);
    put(path, strlen(path));
    put(data, (size_t)size);
}

static int opening(const char *path, int flags, mode_t mode) {
    int new = (flags & O_CREAT) && syscall(SYS_access, path, F_OK) != 0;
    int mine = watched(path);
    pthread_mutex_lock(&lock);
    int failed = mine && (new || (flags & O_TRUNC)) && fails('o');
    int file = failed ? -1 : (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
    if (file >= 0 && file < FILES) {
        free(opened[file]);
        opened[file] = mine ? strdup(path) : NULL;
        if (mine && new) note('o', path, 0, "", 0);
        else if (mine && (flags & O_TRUNC)) note('s', path, 0, "", 0);
    }
    pthread_mutex_unlock(&lock);
    return file;
}

#define OPEN(name)                                        \
    int name(const char *path, int flags, ...) {          \
        mode_t mode = 0;                                  \
        if (flags & O_CREAT) {                            \
            va_list more;                                 \
            va_start(more, flags);                        \
            mode = va_arg(more, mode_t);                  \
            va_end(more);                                 \
        }                                                 \
        return opening(path, flags, mode);                \
    }
OPEN(open)
OPEN(open64)

int close(int file) {
    pthread_mutex_lock(&lock);
    if (file >= 0 && file < FILES) {
        free(opened[file]);
        opened[file] = NULL;
    }
    int result = (int)syscall(SYS_close, file);
    pthread_mutex_unlock(&lock);
    return result;
}

/* A failing write has written half of its data, as on a full disk. */
static ssize_t writing(int file, const void *data, size_t size, int64_t offset, int placed) {
    const char *path = path_of(file);
    if (!path) return placed ? syscall(SYS_pwrite64, file, data, size, offset) : syscall(SYS_write, file, data, size);
    pthread_mutex_lock(&lock);
    if (!placed) offset = syscall(SYS_lseek, file, 0, SEEK_CUR);
    int failed = fails('w'), why = errno;
    size_t part = failed ? size / 2 : size;
    ssize_t result = placed ? syscall(SYS_pwrite64, file, data, part, offset) : syscall(SYS_write, file, data, part);
    if (result > 0) note('w', path, offset, data, result);
    pthread_mutex_unlock(&lock);
    if (failed) {
        errno = why;
        return -1;
    }
    return result;
}

ssize_t write(int file, const void *data, size_t size) { return writing(file, data, size, 0, 0); }
ssize_t pwrite(int file, const void *data, size_t size, off_t offset) { return writing(file, data, size, offset, 1); }
ssize_t pwrite64(int file, const void *data, size_t size, off64_t offset) { return writing(file, data, size, offset, 1); }

static int syncing(int file, long number) {
    const char *path = path_of(file);
    if (!path) return (int)syscall(number, file);
    pthread_mutex_lock(&lock);
    int result = fails('f') ? -1 : 0; /* the folder is in memory, so there is nothing to flush */
    if (!result) note('f', path, 0, "", 0);
    pthread_mutex_unlock(&lock);
    return result;
}

int fsync(int file) { return syncing(file, SYS_fsync); }
int fdatasync(int file) { return syncing(file, SYS_fdatasync); }

static int cutting(int file, int64_t size) {
    const char *path = path_of(file);
    if (!path) return (int)syscall(SYS_ftruncate, file, size);
    pthread_mutex_lock(&lock);
    int result = fails('s') ? -1 : (int)syscall(SYS_ftruncate, file, size);
    if (!result) note('s', path, size, "", 0);
    pthread_mutex_unlock(&lock);
    return result;
}

int ftruncate(int file, off_t size) { return cutting(file, size); }
int ftruncate64(int file, off64_t size) { return cutting(file, size); }

int rename(const char *path, const char *other) {
    if (!watched(path)) return (int)syscall(SYS_renameat, AT_FDCWD, path, AT_FDCWD, other);
    pthread_mutex_lock(&lock);
    int result = fails('r') ? -1 : (int)syscall(SYS_renameat, AT_FDCWD, path, AT_FDCWD, other);
    if (!result) note('r', path, 0, other, (int64_t)strlen(other));
    pthread_mutex_unlock(&lock);
    return result;
}

int unlink(const char *path) {
    if (!watched(path)) return (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0);
    pthread_mutex_lock(&lock);
    int result = fails('u') ? -1 : (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0);
    if (!result) note('u', path, 0, "", 0);
    pthread_mutex_unlock(&lock);
    return result;
}
