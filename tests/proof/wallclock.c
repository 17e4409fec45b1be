/* The wall clock, set by as many seconds as the file $WALLCLOCK says; and as many more,
   with the clock that runs on in sleep, as $SLEPT says that the host has slept.

   cc -shared -fPIC -o wallclock.so wallclock.c; LD_PRELOAD=.../wallclock.so PROGRAM

   For what libfaketime does not: it takes a deadline of the monotonic clock for one of
   the wall clock when only that is to be false. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long seconds_in(const char *variable)
{
    char text[32] = "";
    const char *name = getenv(variable);
    int fd = name ? open(name, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0)
        return 0;
    if (read(fd, text, sizeof text - 1) < 0)
        text[0] = 0;
    close(fd);
    return atol(text);
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    static int (*real)(clockid_t, struct timespec *);
    if (!real)
        real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(clock, now);
    if (clock == CLOCK_REALTIME && status == 0)
        now->tv_sec += seconds_in("WALLCLOCK");
    if ((clock == CLOCK_REALTIME || clock == CLOCK_BOOTTIME) && status == 0)
        now->tv_sec += seconds_in("SLEPT");
    return status;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    struct timespec found;
    (void)zone;
    int status = clock_gettime(CLOCK_REALTIME, &found);
    now->tv_sec = found.tv_sec;
    now->tv_usec = found.tv_nsec / 1000;
    return status;
}

time_t time(time_t *now)
{
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (now)
        *now = found.tv_sec;
    return found.tv_sec;
}
