// A file system that refuses: see faults.py.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

// The call waits until a file is there, for good without one, and is made then.
static int hang(void) {
  const char *until = getenv("FAULTS_UNTIL");
  while (!until || access(until, F_OK)) usleep(10000);
  return 0;
}

static int refused(const char *call, const char *path) {
  const char *rules = getenv("FAULTS"), *when = getenv("FAULTS_WHEN");
  if (!rules || (when && access(when, F_OK))) return 0;
  char copy[4096], *rest = copy, *rule, name[64], pattern[2048];
  int number;
  strncpy(copy, rules, sizeof copy - 1);
  copy[sizeof copy - 1] = 0;
  while ((rule = strsep(&rest, "\n")))
    if (sscanf(rule, "%63s %d %2047[^\n]", name, &number, pattern) == 3 && !strcmp(name, call) && !fnmatch(pattern, path, 0)) {
      if (!number) return hang();
      errno = number;
      return 1;
    }
  return 0;
}

static void absolute(int folder, const char *path, char *out) {
  char base[PATH_MAX] = "", link[64];
  if (path[0] != '/') {
    if (folder == AT_FDCWD) { if (!getcwd(base, sizeof base)) base[0] = 0; }
    else {
      snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
      ssize_t n = readlink(link, base, sizeof base - 1);
      base[n > 0 ? n : 0] = 0;
    }
    strncat(base, "/", sizeof base - strlen(base) - 1);
  }
  snprintf(out, 2 * PATH_MAX, "%s%s", base, path);
  struct stat s;
  if (!lstat(out, &s) && S_ISDIR(s.st_mode) && out[strlen(out) - 1] != '/') strcat(out, "/");
}

static int refused_at(const char *call, int folder, const char *path) {
  char full[2 * PATH_MAX + 2];
  if (!getenv("FAULTS") || !path) return 0;
  absolute(folder, path, full);
  return refused(call, full);
}

static int refused_file(const char *call, int number) {
  char link[64], path[PATH_MAX + 2];
  if (!getenv("FAULTS")) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", number);
  ssize_t n = readlink(link, path, PATH_MAX);
  path[n > 0 ? n : 0] = 0;
  struct stat s;
  if (!fstat(number, &s) && S_ISDIR(s.st_mode)) strcat(path, "/");
  return refused(call, path);
}

#define MODE(flags) va_list list; va_start(list, flags); mode_t mode = va_arg(list, mode_t); va_end(list);
#define TO_WRITE(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT))
int open(const char *p, int f, ...) { MODE(f) return TO_WRITE(f) && refused_at("open", AT_FDCWD, p) ? -1 : REAL(open)(p, f, mode); }
int open64(const char *p, int f, ...) { MODE(f) return TO_WRITE(f) && refused_at("open", AT_FDCWD, p) ? -1 : REAL(open64)(p, f, mode); }
int openat(int d, const char *p, int f, ...) { MODE(f) return TO_WRITE(f) && refused_at("open", d, p) ? -1 : REAL(openat)(d, p, f, mode); }
int openat64(int d, const char *p, int f, ...) { MODE(f) return TO_WRITE(f) && refused_at("open", d, p) ? -1 : REAL(openat64)(d, p, f, mode); }
ssize_t write(int n, const void *b, size_t s) { return refused_file("write", n) ? -1 : REAL(write)(n, b, s); }
ssize_t pwrite(int n, const void *b, size_t s, off_t o) { return refused_file("write", n) ? -1 : REAL(pwrite)(n, b, s, o); }
ssize_t pwrite64(int n, const void *b, size_t s, off64_t o) { return refused_file("write", n) ? -1 : REAL(pwrite64)(n, b, s, o); }
ssize_t sendfile(int n, int from, off_t *o, size_t s) { return refused_file("write", n) ? -1 : REAL(sendfile)(n, from, o, s); }
ssize_t sendfile64(int n, int from, off64_t *o, size_t s) { return refused_file("write", n) ? -1 : REAL(sendfile64)(n, from, o, s); }
int truncate(const char *p, off_t s) { return refused_at("truncate", AT_FDCWD, p) ? -1 : REAL(truncate)(p, s); }
int truncate64(const char *p, off64_t s) { return refused_at("truncate", AT_FDCWD, p) ? -1 : REAL(truncate64)(p, s); }
int fsync(int n) { return refused_file("fsync", n) ? -1 : REAL(fsync)(n); }
int rename(const char *a, const char *b) { return refused_at("rename", AT_FDCWD, b) ? -1 : REAL(rename)(a, b); }
int link(const char *a, const char *b) { return refused_at("link", AT_FDCWD, b) ? -1 : REAL(link)(a, b); }
int mkdir(const char *p, mode_t m) { return refused_at("mkdir", AT_FDCWD, p) ? -1 : REAL(mkdir)(p, m); }
int unlink(const char *p) { return refused_at("remove", AT_FDCWD, p) ? -1 : REAL(unlink)(p); }
int rmdir(const char *p) { return refused_at("remove", AT_FDCWD, p) ? -1 : REAL(rmdir)(p); }
int unlinkat(int d, const char *p, int f) { return refused_at("remove", d, p) ? -1 : REAL(unlinkat)(d, p, f); }
int flock(int n, int how) { return refused_file("flock", n) ? -1 : REAL(flock)(n, how); }
