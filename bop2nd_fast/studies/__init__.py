"""Studies: many trainings that answer one question, spread over processes and machines, believed with seeds.

.. code-block:: shell

    bop2nd study optimizers --data cifar10 --data-dir DIR --seeds 3 --epochs 10 --width 32 --workers 2

``definitions`` says what is compared, ``start`` makes a study or goes on with it, ``worker`` runs its trials,
``report`` makes the table and the pictures.
"""
