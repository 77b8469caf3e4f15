import com.zaxxer.hikari.HikariConfig;
import com.zaxxer.hikari.HikariDataSource;

import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.lang.reflect.Proxy;
import java.sql.Connection;
import java.sql.Statement;
import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.StringJoiner;
import java.util.concurrent.CyclicBarrier;
import java.util.concurrent.atomic.AtomicInteger;
import javax.sql.DataSource;

/**
 * HikariCP for hikari.py: takes its orders as lines, and answers each with a line.
 *
 * <p>Run from its source ({@code java -cp ... Hikari.java}), so it is one file that needs no build.
 */
public class Hikari {
    public static void main(String[] arguments) throws Exception {
        BufferedReader orders = new BufferedReader(new InputStreamReader(System.in));
        Caller caller = null;
        for (String order; (order = orders.readLine()) != null; ) {
            String[] words = order.split(" ");
            switch (words[0]) {
                case "spike":
                    System.out.println(spike(numbers(words)));
                    break;
                case "call":
                    caller = new Caller(words);
                    System.out.println("calling");
                    break;
                case "served":
                    System.out.println(caller.servedSince(Long.parseLong(words[1])));
                    break;
                case "stop":
                    System.out.println(caller.end());
                    break;
                default:
                    throw new IllegalArgumentException(order);
            }
        }
        System.exit(0); // also where a caller was not told to stop
    }

    private static int[] numbers(String[] words) {
        int[] numbers = new int[words.length - 1];
        for (int at = 0; at < numbers.length; at++) {
            numbers[at] = Integer.parseInt(words[at + 1]);
        }
        return numbers;
    }

    /**
     * Have many threads ask at once.  Numbers: requests, idle connections, the limit, and how many
     * milliseconds a connect, the work and the wait at the end take.
     *
     * @return how many connections were opened, and how many nanoseconds each request took.
     */
    private static String spike(int[] told) throws Exception {
        int requests = told[0];
        AtomicInteger opened = new AtomicInteger();
        HikariConfig config = new HikariConfig();
        config.setDataSource(slow(told[3], opened));
        config.setMinimumIdle(told[1]);
        config.setMaximumPoolSize(told[2]);
        try (HikariDataSource pool = new HikariDataSource(config)) {
            while (pool.getHikariPoolMXBean().getIdleConnections() < told[1]) {
                Thread.sleep(10);
            }
            int before = opened.get();
            long[] took = new long[requests];
            CyclicBarrier ready = new CyclicBarrier(requests);
            List<Thread> threads = new ArrayList<>();
            for (int at = 0; at < requests; at++) {
                int number = at;
                Thread thread = new Thread(() -> {
                    try {
                        ready.await();
                        long begin = System.nanoTime();
                        try (Connection connection = pool.getConnection()) {
                            Thread.sleep(told[4]);
                        }
                        took[number] = System.nanoTime() - begin;
                    } catch (Exception error) {
                        error.printStackTrace();
                    }
                });
                threads.add(thread);
                thread.start();
            }
            for (Thread thread : threads) {
                thread.join();
            }
            Thread.sleep(told[5]);
            StringJoiner answer = new StringJoiner(" ").add(String.valueOf(opened.get() - before));
            for (long nanoseconds : took) {
                answer.add(String.valueOf(nanoseconds));
            }
            return answer.toString();
        }
    }

    /** A driver that takes time to connect, counts, and whose connections do nothing. */
    private static DataSource slow(int milliseconds, AtomicInteger opened) {
        return (DataSource) stub(DataSource.class, (proxy, method, arguments) -> {
            if (!method.getName().equals("getConnection")) {
                return nothing(method.getReturnType());
            }
            opened.incrementAndGet();
            Thread.sleep(milliseconds);
            return stub(Connection.class, (self, called, with) ->
                    called.getName().equals("isValid") ? true : nothing(called.getReturnType()));
        });
    }

    private static Object stub(Class<?> kind, java.lang.reflect.InvocationHandler handler) {
        return Proxy.newProxyInstance(kind.getClassLoader(), new Class<?>[] {kind}, (proxy, method, arguments) -> {
            switch (method.getName()) {
                case "hashCode":
                    return System.identityHashCode(proxy);
                case "equals":
                    return proxy == arguments[0];
                case "toString":
                    return kind.getSimpleName();
                default:
                    return handler.invoke(proxy, method, arguments);
            }
        });
    }

    private static Object nothing(Class<?> kind) {
        return kind == boolean.class ? (Object) false : kind == int.class ? (Object) 0 : null;
    }

    /** Somebody who asks for a connection every now and then, and uses it. */
    private static class Caller {
        private final HikariDataSource pool;
        private final long period;
        private final long pause;
        private final List<long[]> requests = Collections.synchronizedList(new ArrayList<>());
        private final Thread thread = new Thread(this::run);
        private volatile boolean ended;

        /** Words: URL, user, password, the limit, and milliseconds: timeout, period, pause after an error. */
        Caller(String[] words) throws Exception {
            HikariConfig config = new HikariConfig();
            config.setJdbcUrl(words[1]);
            config.setUsername(words[2]);
            config.setPassword(words[3]);
            config.setMaximumPoolSize(Integer.parseInt(words[4]));
            config.setInitializationFailTimeout(-1); // it waits below, on a busy machine for longer
            config.setConnectionTimeout(Long.parseLong(words[5]));
            config.setValidationTimeout(Long.parseLong(words[5]));
            period = Long.parseLong(words[6]);
            pause = Long.parseLong(words[7]);
            pool = new HikariDataSource(config);
            while (pool.getHikariPoolMXBean().getIdleConnections() < config.getMaximumPoolSize()) {
                Thread.sleep(10);
            }
            thread.setDaemon(true);
            thread.start();
        }

        private void run() {
            try {
                while (!ended) {
                    long begin = System.currentTimeMillis();
                    boolean served = request();
                    long end = System.currentTimeMillis();
                    requests.add(new long[] {begin, end, served ? 1 : 0});
                    Thread.sleep(served ? Math.max(0, begin + period - end) : pause);
                }
            } catch (InterruptedException error) {
                // It was told to end in its pause.
            }
        }

        private boolean request() {
            try (Connection connection = pool.getConnection(); Statement statement = connection.createStatement()) {
                statement.execute("SELECT 1");
                return true;
            } catch (Exception error) {
                return false;
            }
        }

        boolean servedSince(long since) {
            synchronized (requests) {
                return requests.stream().anyMatch(request -> request[2] == 1 && request[1] >= since);
            }
        }

        /** Answer when each request began and ended, in milliseconds, and whether it was served. */
        String end() throws Exception {
            ended = true;
            thread.interrupt();
            thread.join();
            pool.close();
            StringJoiner answer = new StringJoiner(" ");
            for (long[] request : requests) {
                answer.add(request[0] + ":" + request[1] + ":" + request[2]);
            }
            return answer.toString();
        }
    }
}
