/* Numbers the calls by which a process changes what is under two folders, and lets one of them fail.

   A seccomp filter has the kernel send SIGSYS in place of each such system call, whichever library makes it: Rust
   programs do without libc, so that functions which take libc's place (LD_PRELOAD) would miss some. The handler makes
   the call itself, marked by a sixth argument, which the kernel ignores. A log holds each call's number, name and
   path, a line each. Linux on x86-64 and on 64-bit ARM. The library is preloaded because programs that the process
   starts inherit the filter: they need the handler too.

   What happens at the call of the number asked for:

       KILL     the process gets SIGKILL before it
       EIO      it fails, it alone
       ENOSPC   the disk is full: of a write, half is written; this call and all later ones that need room fail
*/

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#if defined(__x86_64__)
#define ARGUMENTS(r) {r[REG_RDI], r[REG_RSI], r[REG_RDX], r[REG_R10], r[REG_R8]}
#define REGISTERS(context) ((context)->uc_mcontext.gregs)
#define RESULT REG_RAX
#elif defined(__aarch64__)
#define ARGUMENTS(r) {r[0], r[1], r[2], r[3], r[4]}
#define REGISTERS(context) ((context)->uc_mcontext.regs)
#define RESULT 0
#else
#error "only x86-64 and 64-bit ARM"
#endif

#define KILL (-1)
#define OURS 0x6d6c6d21 /* the sixth argument of a call that passes the filter */

/* Positions of arguments: the path and the folder that it is relative to (-1: the working directory), or the open
   file; and of an open's flags. A call with `room` takes space on the disk. */
static const struct call {
    int number;
    const char *name;
    int path, folder, file, flags, room;
} traced[] = {
#ifdef SYS_open /* the old forms, which newer machines lack */
    {SYS_open, "open", 0, -1, -1, 1, 1},
    {SYS_creat, "open", 0, -1, -1, -1, 1},
    {SYS_mkdir, "mkdir", 0, -1, -1, -1, 1},
    {SYS_link, "link", 1, -1, -1, -1, 1},
    {SYS_symlink, "symlink", 1, -1, -1, -1, 1},
    {SYS_rename, "rename", 1, -1, -1, -1, 0},
    {SYS_unlink, "unlink", 0, -1, -1, -1, 0},
    {SYS_rmdir, "rmdir", 0, -1, -1, -1, 0},
#endif
#ifdef SYS_renameat
    {SYS_renameat, "rename", 3, 2, -1, -1, 0},
#endif
    {SYS_openat, "open", 1, 0, -1, 2, 1},
    {SYS_mkdirat, "mkdir", 1, 0, -1, -1, 1},
    {SYS_linkat, "link", 3, 2, -1, -1, 1},
    {SYS_symlinkat, "symlink", 2, 1, -1, -1, 1},
    {SYS_renameat2, "rename", 3, 2, -1, -1, 0},
    {SYS_unlinkat, "unlink", 1, 0, -1, -1, 0},
    {SYS_write, "write", -1, -1, 0, -1, 1},
    {SYS_pwrite64, "write", -1, -1, 0, -1, 1},
    {SYS_writev, "write", -1, -1, 0, -1, 1},
    {SYS_pwritev, "write", -1, -1, 0, -1, 1},
    {SYS_sendfile, "write", -1, -1, 0, -1, 1},
    {SYS_fallocate, "fallocate", -1, -1, 0, -1, 1},
    {SYS_ftruncate, "ftruncate", -1, -1, 0, -1, 0},
    {SYS_fsync, "fsync", -1, -1, 0, -1, 0},
    {SYS_fdatasync, "fdatasync", -1, -1, 0, -1, 0},
};
enum { TRACED = sizeof traced / sizeof *traced };

static char watched[2][PATH_MAX];
static int log_file = -1, fault;
static long target;
static atomic_long calls;
static atomic_int full;

static long ours(long number, const long *a) {
    long result = syscall(number, a[0], a[1], a[2], a[3], a[4], (long)OURS);
    return result < 0 ? -errno : result;
}

static int is_watched(const char *path) {
    for (int i = 0; i < 2; i++) {
        size_t length = strlen(watched[i]);
        if (!strncmp(path, watched[i], length) && (path[length] == '/' || !path[length]))
            return 1;
    }
    return 0;
}

/* The absolute path that a call is about, or an empty one. */
static void find_path(const struct call *call, const long *a, char *whole) {
    const char *path = call->path < 0 ? "" : (const char *)a[call->path];
    int descriptor = call->path < 0 ? (int)a[call->file] : call->folder < 0 ? AT_FDCWD : (int)a[call->folder];
    char link[64] = "/proc/self/cwd";
    whole[0] = 0;
    if (path[0] == '/') {
        snprintf(whole, PATH_MAX, "%s", path);
        return;
    }
    if (descriptor != AT_FDCWD)
        snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, whole, PATH_MAX - 1);
    length = length < 0 ? 0 : length;
    snprintf(whole + length, PATH_MAX - length, "%s%s", *path ? "/" : "", path);
}

/* The result of a call: its own, or of its fault. */
static long decide(const struct call *call, long *a) {
    char path[PATH_MAX], line[PATH_MAX + 64];
    find_path(call, a, path);
    if (!is_watched(path))
        return ours(call->number, a);
    long number = atomic_fetch_add(&calls, 1) + 1;
    long text[5] = {log_file, (long)line, snprintf(line, sizeof line, "%ld %s %s\n", number, call->name, path)};
    ours(SYS_write, text);
    if (number == target && fault == KILL)
        kill(getpid(), SIGKILL);
    if (number == target && fault == EIO)
        return -EIO;
    if (number == target && fault == ENOSPC) {
        atomic_store(&full, 1);
        if ((call->number != SYS_write && call->number != SYS_pwrite64) || a[2] < 2)
            return -ENOSPC;
        a[2] /= 2;
        return ours(call->number, a);
    }
    int grows = call->room && (call->flags < 0 || access(path, F_OK));
    return atomic_load(&full) && grows ? -ENOSPC : ours(call->number, a);
}

static void trapped(int signal, siginfo_t *info, void *context) {
    (void)signal;
    int before = errno;
    __typeof__(&REGISTERS((ucontext_t *)0)[0]) registers = REGISTERS((ucontext_t *)context);
    long arguments[5] = ARGUMENTS(registers), result = -ENOSYS;
    for (int i = 0; i < TRACED; i++)
        if (traced[i].number == info->si_syscall)
            result = log_file < 0 ? ours(traced[i].number, arguments) : decide(&traced[i], arguments);
    registers[RESULT] = result;
    errno = before;
}

__attribute__((constructor)) static void handle(void) {
    struct sigaction action = {.sa_sigaction = trapped, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART};
    sigaction(SIGSYS, &action, NULL);
}

/* From here on calls are counted, in `descriptor`. what: 0 (no fault), KILL, EIO or ENOSPC, at call `number`, from 1.
   Returns 0, or an errno where the kernel refuses the filter. */
int watch(const char *one, const char *other, int descriptor, int what, long number) {
    struct sock_filter program[4 + 4 * TRACED], *next = program;
    strncpy(watched[0], one, PATH_MAX - 1);
    strncpy(watched[1], other, PATH_MAX - 1);
    log_file = descriptor;
    fault = what;
    target = number;
#define LOAD(field) (struct sock_filter) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define JUMP(test, value, yes, no) (struct sock_filter) BPF_JUMP(BPF_JMP | test | BPF_K, value, yes, no)
#define RETURN(what) (struct sock_filter) BPF_STMT(BPF_RET | BPF_K, what)
    *next++ = LOAD(args[5]);
    *next++ = JUMP(BPF_JEQ, OURS, 0, 1);
    *next++ = RETURN(SECCOMP_RET_ALLOW);
    for (int i = 0; i < TRACED; i++) {
        *next++ = LOAD(nr);
        *next++ = JUMP(BPF_JEQ, traced[i].number, 0, traced[i].flags < 0 ? 1 : 3);
        if (traced[i].flags >= 0) { /* an open that changes nothing passes */
            *next++ = LOAD(args[traced[i].flags]);
            *next++ = JUMP(BPF_JSET, O_CREAT | O_TRUNC, 0, 1);
        }
        *next++ = RETURN(SECCOMP_RET_TRAP);
    }
    *next++ = RETURN(SECCOMP_RET_ALLOW);
    struct sock_fprog filter = {next - program, program};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter))
        return errno;
    return 0;
}
